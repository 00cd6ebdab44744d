"""The scripts here run in environments of their own: what they import is not installed beside pytest."""

collect_ignore = ["triton.py"]
