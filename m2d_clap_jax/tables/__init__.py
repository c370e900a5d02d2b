"""Tables as people bring them: manifests, metadata of tasks and of published data sets, read by one reader.

`reader` turns a file into rows, `names` a row's file name into a file, `layouts` says how published data sets are laid out, and
`entries` joins the three. None of them drops a row silently.
"""
