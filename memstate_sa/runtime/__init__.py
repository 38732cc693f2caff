"""The process: forks, listeners, warnings, log lines. This folder does not know databases."""
