"""`ttsnap serve`: an images server that clients of OpenAI's API use unchanged.

`api` answers requests, which `requests` reads; `guard` lets in whom it should. One thread, the `worker`, owns the model
and searches for all clients at once; `lanes` are searches that share batches. `metrics` counts for Prometheus.
"""
