"""kvrun"""
