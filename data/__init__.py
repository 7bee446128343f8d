"""Driving data: videos, action files, folder layouts, token stores and a synthetic world."""
