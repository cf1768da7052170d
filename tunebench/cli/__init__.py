"""The commands: parse, call one function, print; the only place that exits."""
