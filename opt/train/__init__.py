"""What a run is: checked, planned, recorded, saved."""
