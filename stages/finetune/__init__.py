"""`finetune`: a trained backbone learns a task from labels."""
