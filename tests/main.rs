//! One binary for all integration tests: linking is the slow part.

mod catalog;
mod confinement;
mod convex;
mod convex_door;
mod dev;
mod doctor;
mod floors;
mod homes;
mod http_tls;
mod life;
mod load;
mod mongo;
mod moving;
mod neon;
mod neon_api;
mod neon_homes;
mod neon_limits;
mod neon_projects;
mod postgres;
mod provision;
mod redis;
mod support;
mod transition;
