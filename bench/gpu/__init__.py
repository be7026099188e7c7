"""Spend fifteen minutes on a GPU machine.

`plan` says what runs there, `__main__` runs it, and `parcel` packs what is carried there.
"""
