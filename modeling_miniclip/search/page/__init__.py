"""The search page in a browser.

app.py: `miniclip app`: layout of the search page, and serving it
index_page.py: what the page does
thumbnail_route.py: a fast route to thumbnails
results_page.py: results as an HTML page
pictures.py: the picture of an entry, from its file or thumbnail
"""
