"""The search page in a browser.

app.py: `miniclip app`: the search page
results_page.py: results as an HTML page
pictures.py: the picture of an entry, from its file or thumbnail
"""
