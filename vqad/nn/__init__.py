"""HVQ-Trans and VQ-Flow as plain torch modules."""
