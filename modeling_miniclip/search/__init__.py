"""An index of embedded images: build, update, query, show."""
