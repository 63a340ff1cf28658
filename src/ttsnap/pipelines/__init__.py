"""Stock pipelines as suspended calls, and what they ask for in full batches."""
