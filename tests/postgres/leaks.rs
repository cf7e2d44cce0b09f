//! Nothing that one client of a tenant leaves behind is ever seen by the next one on the same server connection.
