"""Policies and data: the small world, pretrained policies, data of one's own."""
