"""Packaged search spaces, found by their names: `dray tune SPEC --space NAME`."""
