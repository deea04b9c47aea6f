"""`genret browse`: a local web page to try a trained model by hand.

`trace` explains how a search built an identifier, `recaller` recalls and answers, `app` serves both and `page.html`.
"""
