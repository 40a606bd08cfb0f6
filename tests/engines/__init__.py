"""Tests of the engines: a package, so that a test file may have the name of another one elsewhere."""
