"""prefect_host"""
