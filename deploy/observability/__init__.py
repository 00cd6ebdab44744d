"""Rules, dashboards and pictures, and the scripts that make what is made."""
