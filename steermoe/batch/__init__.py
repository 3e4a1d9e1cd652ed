"""Many stories from a file of prompts, resumable: `jobs` reads what to tell, `plans` finds the steering that is asked
for, `output` keeps the stories, `run` brings them through an engine.
"""
