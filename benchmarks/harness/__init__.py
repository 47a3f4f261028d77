"""Measuring: clocks, scenarios, statistics, environment, counters, report. Knows neither `compress` nor `deploy`.

Import from the modules: a process that times something loads no more than it needs.
"""
