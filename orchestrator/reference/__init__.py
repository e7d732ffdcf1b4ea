"""What a pipeline file may say, for readers: the page of the reference, the JSON Schema, `explain`, the presets."""
