"""The page of `ttsnap app`: watch a search and take part in it.

It calls the library and shows; searching, comparing and picking are the library's. `story` gathers what an observer is
told, `view` draws it, `desk` lets searches wait in line, `page` and `explore` are the tabs, `server` serves them.
"""
