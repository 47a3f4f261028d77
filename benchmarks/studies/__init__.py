"""The experiments of the papers that Espalier's mathematics comes from, one runnable module each."""
