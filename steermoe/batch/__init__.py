"""Stories from a file of prompts, resumable: `jobs` reads the prompts, `keys` identifies each story, `output` stores
the stories, `worker` and `cluster` generate them, `batch` combines all this.
"""
