"""Recipes as package data; `recipe:NAME` finds them."""
