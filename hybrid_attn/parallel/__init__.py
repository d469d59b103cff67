"""How arrays lie over devices."""
