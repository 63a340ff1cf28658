"""The answering side of a search: live pipelines and recorded rewards."""
