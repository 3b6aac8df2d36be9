"""Tables of measurements that others made, read with their columns, units and mistakes."""
