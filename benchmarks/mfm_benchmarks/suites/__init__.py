"""The suites; each file has one."""
