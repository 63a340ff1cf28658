"""The page of `ttsnap app`: watch a search and take part in it.

It calls the library and shows; searching, comparing and picking are the library's. `searches` takes requests and a
`job` runs one when its turn in the queue comes; `history` gathers what an observer is told and `view` draws it; `page`
and `explore` are the tabs, `server` serves them.
"""
