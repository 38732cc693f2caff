"""The process we run in: forks, listeners, warnings, log lines. Nothing here knows a database."""
