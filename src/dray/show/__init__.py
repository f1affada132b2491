"""What a person sees: `progress.py` while something runs, `report.py` afterwards."""
