"""Reports: tables and figures made from measurements, never from models."""
