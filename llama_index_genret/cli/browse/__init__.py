"""`genret browse`: a page on this machine, to try a trained model by hand.

`spelling` tells how an identifier was spelled, `recaller` recalls and answers, `app` serves both and `page.html`.
"""
