"""How do we come to know of each server? Metrics pages: scrape.py asks (edge), page.py and response.py read (pure)."""
