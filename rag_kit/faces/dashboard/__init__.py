"""A page on which up to four models answer side by side; shown in notebook 05.

Its parts: `page` (controls and threads), `column` (one arm), `work` (one question on its way), `render`
(HTML), `page.css` (its looks).
"""

from rag_kit.faces.dashboard.page import Dashboard

__all__ = ["Dashboard", "dashboard"]

dashboard = Dashboard  # a verb to those who show the page, a class to those who build on it
