"""The trials of scripts/fault_campaign.py, a file each kind."""
