"""The local page of a work directory: files → runs (folder), runs → HTML (page), both → a browser (server)."""
