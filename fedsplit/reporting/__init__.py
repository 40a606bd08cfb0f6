"""Reports: what the folders of runs hold, as a page with figures and tables."""
