"""A local web page, and a JSON API, that classify videos: `zeroi2v serve MODEL`."""
