"""An unattended poller of bank balances: accounts → timetable → beat → poll → decide → stream."""

__version__ = "0.1.0"
