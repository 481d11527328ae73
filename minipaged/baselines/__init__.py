"""The systems that paging is compared with: how each holds memory and admits requests, and shadows of them beside a real run."""
