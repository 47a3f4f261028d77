"""The fake GPU has the surface of the real one, and fails as told."""

import inspect

from tests.fakes import cuda


def test_the_fake_device_has_the_surface_of_the_real_one() -> None:
    from deploy.runtimes.cuda import CudaDevice, Stream

    for real, fake in ((CudaDevice, cuda.FakeCuda), (Stream, cuda.FakeStream)):
        for name, member in vars(real).items():
            if name.startswith("_") or not inspect.isfunction(member):
                continue
            wanted, got = (list(inspect.signature(getattr(kind, name)).parameters) for kind in (real, fake))
            assert wanted == got, name
