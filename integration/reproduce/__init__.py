"""GRACE's experiment on Flickr30K and MS-COCO, by `python -m integration.reproduce`."""
