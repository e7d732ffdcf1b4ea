"""What a store holds, shown, compared and cleaned: `status`, `logs`, `gc`, `verify`, `checkpoint inspect`."""
