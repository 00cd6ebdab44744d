"""The scripts here are started as servers.

Two import what is not installed beside pytest. One imports Ray, which reads its environment when it is first
imported: collecting tests must not be that moment.
"""

collect_ignore = ["run_mlserver.py", "run_pytriton.py", "run_serve.py"]
