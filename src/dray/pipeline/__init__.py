"""One spec from raw data to a model that answers: `release.py` goes through the stages in order,
`stages.py` is what each of them finds there already, and does where it finds nothing.

A stage hands on what lies in the storage or in a folder, never a live object; so a release that was
stopped, or whose spec has changed since, does again only what is not there.
"""
