"""A demonstration: a corpus rendered from a sound font, with captions, and the page that tries a model in a browser."""
