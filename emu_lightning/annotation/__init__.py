"""The web application for people: screening, photography review, captions, A/B judging. Knows no torch."""
