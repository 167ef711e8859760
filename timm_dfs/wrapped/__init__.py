"""Any backbone of timm's with exits."""
