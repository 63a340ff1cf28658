"""Many prompts on many workers: one loop hands out blocks of prompts, to this process or to Ray actors anywhere.

jobs.py      what a worker can do: load once, plan, work on a block of prompts
record.py label.py generate.py      the three jobs
scheduling.py    the loop: hand out blocks, see what becomes of them, try again, tell failures by prompt
ray_pool.py      workers as Ray actors
"""
